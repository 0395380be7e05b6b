// Contexts of execution that switch stacks, and what the sanitizers must know about them.
//
// Built with -fsanitize=thread, every fiber is a thread of its own for the sanitizer, and only the
// barriers of the emulated machine order their accesses. The sanitizer then reports every pair of
// accesses to shared or device memory that no barrier orders, whether or not a result changes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// Functions that read the state of the emulator, which is no memory of the emulated machine.
#define OPTICAL_EMULATOR __attribute__((no_sanitize("thread"), noinline))
#else
#define OPTICAL_EMULATOR
#endif

namespace optical {
namespace cuda {
namespace emulator {

// While one exists, this fiber's accesses belong to the emulator and race with nothing.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
    Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
    ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
    Unwatched() {}
    ~Unwatched() {}
#endif
};

// What a fiber did before release() happened before what another does after acquire().
inline void release_order(char* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(token);
#endif
    (void)token;
}
inline void acquire_order(char* token) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(token);
#endif
    (void)token;
}

// The sanitizer's name of a context.
struct Identity {
#if defined(__SANITIZE_THREAD__)
    void* fiber = nullptr;
    void create() { fiber = __tsan_create_fiber(0); }
    void adopt() { fiber = __tsan_get_current_fiber(); }
    void destroy() { __tsan_destroy_fiber(fiber); }
    // `ordered`: all that this context did happens before what `to` does from now on.
    OPTICAL_EMULATOR static void change(Identity& to, bool ordered) {
        __tsan_switch_to_fiber(to.fiber, ordered ? 0 : 1);
    }
#else
    void create() {}
    void adopt() {}
    void destroy() {}
    static void change(Identity&, bool) {}
#endif
};

// Fibers that end leave the redzones of their frames behind.
inline void forget_frames(char* stacks, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks, bytes);
#endif
    (void)stacks, (void)bytes;
}

#if defined(__x86_64__)
// Saves the callee-saved registers and switches stacks.
extern "C" void optical_switch(void** save, void* load);
asm(R"(
.text
.type optical_switch,@function
optical_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size optical_switch,.-optical_switch
)");
struct Context {
    void* stack = nullptr;
    Identity identity;
    void prepare(char* bottom, size_t size, void (*entry)()) {
        void** top = (void**)((uintptr_t)(bottom + size) & ~(uintptr_t)15);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = (void*)entry;
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack = top;
    }
    OPTICAL_EMULATOR static void change(Context& from, Context& to, bool ordered = false) {
        Identity::change(to.identity, ordered);
        optical_switch(&from.stack, to.stack);
    }
};
#else
struct Context {
    ucontext_t context;
    Identity identity;
    void prepare(char* bottom, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom, context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    OPTICAL_EMULATOR static void change(Context& from, Context& to, bool ordered = false) {
        Identity::change(to.identity, ordered);
        swapcontext(&from.context, &to.context);
    }
};
#endif

}  // namespace emulator
}  // namespace cuda
}  // namespace optical
