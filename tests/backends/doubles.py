"""Test doubles of NVIDIA's driver and of NVRTC."""

import ctypes

from optical.backends import nvrtc, structs
from optical.io import nvidia
from optical.io.nvidia import DeviceAttribute


class Driver:
    """A test double of libcuda that records its calls.

    Args:
        capability: of the device.
        shared: bytes of shared memory per block.
        clusters: the largest cluster that the device can schedule.
    """

    def __init__(self, capability=(9, 0), shared=227 << 10, clusters=8):
        attribute = DeviceAttribute
        self.attributes = {
            attribute.COMPUTE_CAPABILITY_MAJOR: capability[0],
            attribute.COMPUTE_CAPABILITY_MINOR: capability[1],
            attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: shared,
        }
        self.shared, self.clusters = shared, clusters
        self.loaded, self.launches, self.status, self.load_status = [], [], 0, 0
        self.context, self.modes, self.queries = 1, [0], 0

    def cuGetErrorName(self, status, text):
        text._obj.value = b"CUDA_ERROR_%d" % status
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"the driver's own words"
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = self.context
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 10 + device.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.context = context.value
        return 0

    def cuCtxGetDevice(self, device):
        assert self.context
        device._obj.value = 0
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.modes.append(mode._obj.value)
        mode._obj.value = self.modes[-2]
        return 0

    def cuDeviceGetAttribute(self, value, name, device):
        self.queries += 1
        value._obj.value = self.attributes[name]
        return 0

    def cuOccupancyMaxActiveClusters(self, count, function, config):
        c = config._obj
        assert c.bx == 256 and c.shared == self.shared and c.gx == c.attributes[0].value[0]
        count._obj.value = int(c.gx <= self.clusters)
        return 0 if c.gx <= self.clusters else 999

    def cuModuleLoadData(self, module, binary):
        assert self.modes[-1] == nvidia.RELAXED_CAPTURE
        if self.load_status:
            return self.load_status
        self.loaded.append(binary)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = len(self.loaded)
        return 0

    def cuFuncSetAttribute(self, function, name, value):
        assert name == nvrtc.FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        assert value == self.shared
        return 0

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        c = config._obj
        name = self.loaded[function.value - 1].decode()
        cluster = None
        if c.count:
            assert c.attributes[0].id == nvrtc.LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = list(c.attributes[0].value[:3])
        number = ctypes.c_int.from_address(addresses[len(addresses) - 1]).value
        first = structs.ProblemStruct.from_address(addresses[0])
        self.launches.append((name, c.gx, c.bx, c.shared, c.stream, cluster, number, first.n))
        return self.status


class Compiler:
    """A test double of NVRTC that knows some architectures."""

    def __init__(self, *known):
        self.known = known

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = 12, 8
        return 0

    def nvrtcGetNumSupportedArchs(self, count):
        count._obj.value = len(self.known)
        return 0

    def nvrtcGetSupportedArchs(self, known):
        known[:] = self.known
        return 0
