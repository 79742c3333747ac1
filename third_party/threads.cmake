# POSIX threads, through CMake's own module.
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
