# find_package(convnext_deploy) gives the target convnext_deploy::convnext_deploy: the CPU engine and its C header.
if(NOT TARGET convnext_deploy::convnext_deploy)
  add_library(convnext_deploy::convnext_deploy SHARED IMPORTED)
  set_target_properties(convnext_deploy::convnext_deploy PROPERTIES
    IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/libconvnext_deploy.so"
    IMPORTED_SONAME "libconvnext_deploy.so"
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}/include")
endif()
