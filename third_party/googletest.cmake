# GoogleTest and GoogleMock: the C++ tests. Defines GTest::gtest_main and GTest::gmock.
find_package(GTest 1.12 CONFIG QUIET)
if(GTest_FOUND AND TARGET GTest::gmock)
  message(STATUS "googletest: system package ${GTest_VERSION}")
elseif(FRAMEQUILT_FETCH_DEPS)
  framequilt_dependency_fetch(googletest https://github.com/google/googletest.git 6910c9d9165801d8827d628cb72eb7ea9dd538c5
    INSTALL_GTEST=OFF)
  message(STATUS "googletest: downloaded, 1.16.0")
else()
  framequilt_dependency_missing(googletest "libgtest-dev libgmock-dev")
endif()
