# SPDX-License-Identifier: Apache-2.0
# kernel_sources: every translation unit of the kernels, the instances of one head_dim written to the including
# directory's build tree. With TQKV_CUDA_HEAD_DIMS only those of these.
file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/*.cu)
macro(tqkv_choose_head_dims shapes)  # of shapes that begin with a head_dim
  if(TQKV_CUDA_HEAD_DIMS)
    list(JOIN TQKV_CUDA_HEAD_DIMS "|" chosen)
    list(FILTER ${shapes} INCLUDE REGEX "^(${chosen})(,|$)")
  endif()
endmacro()
set(codec_head_dims 64 96 128 256)
tqkv_choose_head_dims(codec_head_dims)
set(lines "")
foreach(head_dim IN LISTS codec_head_dims)
  string(APPEND lines "fast_kernels<${head_dim}>(),\n")
  foreach(op IN ITEMS encode decode)
    set(instance ${CMAKE_CURRENT_BINARY_DIR}/inst/${op}_${head_dim}.cu)
    configure_file(${CMAKE_CURRENT_LIST_DIR}/instance.cu.in ${instance} @ONLY)
    list(APPEND kernel_sources ${instance})
  endforeach()
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/inst/codec_head_dims.inc CONTENT "${lines}")
# The main kernel of attention: head_dim of K, of V, bits of K, of V (0: any; 20: 2 with uniform levels), blocks of 4 rows.
# Those of fixed bits are faster, and come first; who includes this may have chosen fewer.
if(NOT attention_fixed_shapes)
  set(attention_fixed_shapes
    128,128,4,4,1 128,128,4,4,2 128,128,4,3,1 128,128,4,3,2 128,128,3,3,1 128,128,3,3,2 128,128,4,20,1 128,128,4,20,2
    128,128,20,20,1 128,128,20,20,2
    64,64,4,4,1 64,64,3,3,1 64,64,20,20,1 256,256,4,4,1 256,256,3,3,1 256,256,20,20,1)
endif()
if(NOT attention_any_shapes)
  set(attention_any_shapes
    64,64,0,0,2 80,80,0,0,2 96,96,0,0,2 112,112,0,0,2 128,128,0,0,2 192,192,0,0,2 256,256,0,0,2)
endif()
set(attention_shapes ${attention_fixed_shapes} ${attention_any_shapes})
tqkv_choose_head_dims(attention_shapes)
set(lines "")
foreach(attention_shape IN LISTS attention_shapes)
  string(REPLACE "," "_" name ${attention_shape})
  set(instance ${CMAKE_CURRENT_BINARY_DIR}/inst/attention_${name}.cu)
  configure_file(${CMAKE_CURRENT_LIST_DIR}/attention_instance.cu.in ${instance} @ONLY)
  list(APPEND kernel_sources ${instance})
  string(APPEND lines "TQKV_ATTENTION(${attention_shape})\n")
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/inst/attention_shapes.inc CONTENT "${lines}")
# The wide one: the most of head_dim, and whether it is for many rows. The first that takes a call is taken.
set(lines "")
foreach(attention_shape IN ITEMS 64,false 64,true 128,false 128,true 256,false 256,true)
  string(REPLACE "," "_" name ${attention_shape})
  set(instance ${CMAKE_CURRENT_BINARY_DIR}/inst/attention_wide_${name}.cu)
  configure_file(${CMAKE_CURRENT_LIST_DIR}/attention_wide_instance.cu.in ${instance} @ONLY)
  list(APPEND kernel_sources ${instance})
  string(APPEND lines "TQKV_WIDE(${attention_shape})\n")
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/inst/attention_wide_shapes.inc CONTENT "${lines}")
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/attention.cu ${CMAKE_CURRENT_LIST_DIR}/attention_wide.cu
  ${CMAKE_CURRENT_LIST_DIR}/runtime.cu PROPERTIES
  INCLUDE_DIRECTORIES ${CMAKE_CURRENT_BINARY_DIR}/inst)
