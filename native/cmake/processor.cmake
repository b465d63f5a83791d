# Sets FEDLEAN_X86 or FEDLEAN_ARM for the processor that the compiler compiles for (or neither:
# then only the reference kernels are built). The compiler is asked because the machine's name
# lies: a 32-bit Raspberry Pi OS runs on an aarch64 kernel, and macOS cross-compiles with -arch.
include(CheckCXXSourceCompiles)

list(LENGTH CMAKE_OSX_ARCHITECTURES architectures)
if(architectures GREATER 1)
  message(FATAL_ERROR
    "FedLean builds for one architecture at a time, not for ${CMAKE_OSX_ARCHITECTURES}: "
    "set CMAKE_OSX_ARCHITECTURES to arm64 or x86_64.")
endif()

function(fedlean_compiles_for macro result)
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  check_cxx_source_compiles(
    "#ifndef ${macro}\n#error not ${macro}\n#endif\nint here;" ${result})
endfunction()

# The kernels are written in the vector extensions of GCC and Clang.
function(fedlean_require_vectors)
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  check_cxx_source_compiles(
    "typedef float V __attribute__((vector_size(16)));
     V twice(V v) { return __builtin_shufflevector(v, v, 0, 1, 4, 5); }" FEDLEAN_VECTORS)
  if(NOT FEDLEAN_VECTORS)
    message(FATAL_ERROR
      "FedLean's native engine needs GCC 12 or newer, or Clang; the compiler found is "
      "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER}). "
      "Name another one with CXX, for example: CXX=g++-12 pip install .")
  endif()
endfunction()

fedlean_require_vectors()
fedlean_compiles_for(__x86_64__ FEDLEAN_X86)
fedlean_compiles_for(__aarch64__ FEDLEAN_ARM)
