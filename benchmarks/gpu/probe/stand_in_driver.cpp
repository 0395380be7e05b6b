// The functions of the CUDA driver that the probe calls, on the memory of the host.
#include <stdlib.h>
#include <string.h>

extern "C" {

typedef unsigned long long Address;

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int number) { return *device = 0, number; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = nullptr, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxSynchronize() { return 0; }
int cuMemAlloc_v2(Address* address, size_t size) {
    *address = (Address)aligned_alloc(256, (size + 255) / 256 * 256);
    return *address ? 0 : 2;
}
int cuMemFree_v2(Address address) { return free((void*)address), 0; }
int cuMemcpyHtoD_v2(Address to, const void* from, size_t size) {
    return memcpy((void*)to, from, size), 0;
}
int cuMemcpyDtoH_v2(void* to, Address from, size_t size) {
    return memcpy(to, (const void*)from, size), 0;
}
}
