// Arrays in the memory of a CUDA device, or of the host for the emulated kernels.
//
// Device memory comes from the CUDA driver, which is loaded by name, so that one binary serves both.
#pragma once

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

enum Exit { passed = 0, failed = 1, unusable = 2, device_error = 3 };

// The memory of a CUDA device through its driver, or that of the host.
struct Memory {
    bool on_device = false;
    int (*allocate)(unsigned long long*, size_t) = nullptr;
    int (*release)(unsigned long long) = nullptr;
    int (*to_device)(unsigned long long, const void*, size_t) = nullptr;
    int (*to_host)(void*, unsigned long long, size_t) = nullptr;
    int (*synchronize)() = nullptr;

    static void require(int status, const char* what) {
        if (status == 0) return;
        printf("%s failed with error %d of the driver\n", what, status);
        exit(device_error);
    }
    void open() {
        void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (!driver) printf("%s\n", dlerror()), exit(unusable);
        const auto find = [&](const char* name) { return dlsym(driver, name); };
        void* context = nullptr;
        int device = 0;
        require(((int (*)(unsigned))find("cuInit"))(0), "cuInit");
        require(((int (*)(int*, int))find("cuDeviceGet"))(&device, 0), "cuDeviceGet");
        require(((int (*)(void**, int))find("cuDevicePrimaryCtxRetain"))(&context, device),
                "cuDevicePrimaryCtxRetain");
        require(((int (*)(void*))find("cuCtxSetCurrent"))(context), "cuCtxSetCurrent");
        allocate = (int (*)(unsigned long long*, size_t))find("cuMemAlloc_v2");
        release = (int (*)(unsigned long long))find("cuMemFree_v2");
        to_device = (int (*)(unsigned long long, const void*, size_t))find("cuMemcpyHtoD_v2");
        to_host = (int (*)(void*, unsigned long long, size_t))find("cuMemcpyDtoH_v2");
        synchronize = (int (*)())find("cuCtxSynchronize");
        on_device = true;
    }
    void wait() const {
        if (on_device) require(synchronize(), "a kernel");
    }
};
static Memory memory;

// An array on the host with its copy for the kernels. The copy has its exact size, so that
// memcheck notices every access past its end.
template <typename T>
struct Array {
    std::vector<T> host;
    void* device = nullptr;

    Array(size_t size, T fill) : host(size, fill) {
        const size_t room = std::max<size_t>(bytes(), 1);
        unsigned long long address = 0;
        if (memory.on_device)
            Memory::require(memory.allocate(&address, room), "cuMemAlloc"),
                device = (void*)address;
        else
            device = aligned_alloc(256, (room + 255) / 256 * 256);
        send();
    }
    Array(const Array&) = delete;
    ~Array() {
        if (memory.on_device)
            memory.release((unsigned long long)device);
        else
            free(device);
    }
    size_t bytes() const { return host.size() * sizeof(T); }
    void send() {
        if (!bytes()) return;
        if (memory.on_device)
            Memory::require(memory.to_device((unsigned long long)device, host.data(), bytes()),
                            "cuMemcpyHtoD");
        else
            memcpy(device, host.data(), bytes());
    }
    const std::vector<T>& fetch() {
        if (bytes() && memory.on_device)
            Memory::require(memory.to_host(host.data(), (unsigned long long)device, bytes()),
                            "cuMemcpyDtoH");
        else if (bytes())
            memcpy(host.data(), device, bytes());
        return host;
    }
    T* data() const { return (T*)device; }
};
