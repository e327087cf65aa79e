# SPDX-License-Identifier: Apache-2.0
# kernel_sources: every translation unit of the kernels, the instances of one head_dim written to the including
# directory's build tree.
file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
foreach(head_dim IN ITEMS 64 96 128 256)
  foreach(op IN ITEMS encode decode)
    set(instance ${CMAKE_CURRENT_BINARY_DIR}/inst/${op}_${head_dim}.cu)
    configure_file(${CMAKE_CURRENT_LIST_DIR}/instance.cu.in ${instance} @ONLY)
    list(APPEND kernel_sources ${instance})
  endforeach()
endforeach()
