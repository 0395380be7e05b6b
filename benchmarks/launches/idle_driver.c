/* The entry points of the CUDA driver that Triton's launcher uses; none does anything.
 *
 * A call then takes the time of the host alone. Launches are counted.
 */
#include <stddef.h>
#include <stdint.h>

typedef int Result;
typedef void *Handle;

long idle_launches = 0;
Handle idle_function = NULL; /* that of the latest launch */

enum { SHARED_PER_BLOCK = 8, WARP_SIZE = 10, MULTIPROCESSORS = 16, SHARED_OPT_IN = 97 };

Result cuLaunchKernelEx(const void *config, Handle function, void **arguments, void **extra) {
  (void)config, (void)arguments, (void)extra;
  idle_launches++;
  idle_function = function;
  return 0;
}
Result cuLaunchKernel(void) {
  idle_launches++;
  return 0;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case SHARED_PER_BLOCK: *value = 49152; break;
    case WARP_SIZE: *value = 32; break;
    case MULTIPROCESSORS: *value = 132; break;
    case SHARED_OPT_IN: *value = 232448; break;
    default: *value = 1024;
  }
  return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0; /* threads of a block; no local memory */
  return 0;
}
Result cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) {
  (void)attribute;
  *data = pointer;
  return 0;
}
Result cuGetErrorString(int code, const char **text) {
  (void)code;
  *text = "the idle driver reports no errors";
  return 0;
}
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) {
  static char functions[4096];
  static size_t count = 0;
  (void)module, (void)name;
  *function = &functions[count++ % sizeof functions];
  return 0;
}
Result cuModuleLoadData(Handle *module, const void *image) {
  (void)image;
  *module = (Handle)1;
  return 0;
}
Result cuCtxGetCurrent(Handle *context) {
  *context = (Handle)1;
  return 0;
}
Result cuDevicePrimaryCtxRetain(Handle *context, int device) {
  (void)device;
  *context = (Handle)1;
  return 0;
}
Result cuDeviceGet(int *device, int ordinal) {
  (void)ordinal;
  *device = 0;
  return 0;
}
Result cuCtxGetLimit(size_t *value, int limit) {
  (void)limit;
  *value = 0;
  return 0;
}
Result cuOccupancyMaxActiveClusters(int *clusters, Handle function, const void *config) {
  (void)function, (void)config;
  *clusters = 1;
  return 0;
}
Result cuCtxSetCurrent(Handle context) { return (void)context, 0; }
Result cuFuncSetAttribute(Handle function, int attribute, int value) {
  return (void)function, (void)attribute, (void)value, 0;
}
Result cuFuncSetCacheConfig(Handle function, int config) { return (void)function, (void)config, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
