# The installed package: headers, the target chela::chela, and a config file that finds Eigen again.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/chela)

install(DIRECTORY include/chela DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(TARGETS chela chela_cuda EXPORT chelaTargets)
install(EXPORT chelaTargets NAMESPACE chela:: DESTINATION ${package_dir})

configure_package_config_file(cmake/chelaConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/chelaConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/chelaConfigVersion.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/chelaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/chelaConfigVersion.cmake
  DESTINATION ${package_dir})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
