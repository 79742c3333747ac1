# What the compiler made of a file of kernels for AVX-VNNI: dot products in that extension's encoding,
# and nothing that only AVX-512 has. The machines it is for have no AVX-512, the one that tests may have:
# there a wrong encoding would pass every other test.
#
#   cmake -D OBJDUMP=... -D OBJECT=... -D "DOTS=vpdpbusd;vpdpwssd" -P avx_vnni_object.cmake
set(listing ${OBJECT}.listing)
execute_process(COMMAND ${OBJDUMP} -d -w ${OBJECT} OUTPUT_FILE ${listing} COMMAND_ERROR_IS_FATAL ANY)
# Lines are "address:\tbytes\tinstruction". In 64-bit code the byte 62 begins AVX-512's encoding (EVEX)
# and nothing else, c4 the long one of AVX (VEX).
file(STRINGS ${listing} foreign REGEX ":\t62 ")
set(found)
set(missing)
foreach(dot IN LISTS DOTS)
  file(STRINGS ${listing} dots REGEX ":\tc4 [0-9a-f ]+\t.*${dot}")
  list(LENGTH dots count)
  if(count EQUAL 0)
    list(APPEND missing ${dot})
  endif()
  list(APPEND found "${count} ${dot}")
endforeach()
file(REMOVE ${listing})
list(LENGTH foreign foreign_count)
if(missing OR NOT DOTS)
  message(FATAL_ERROR "no ${missing} in the encoding of AVX-VNNI in ${OBJECT}")
elseif(foreign_count GREATER 0)
  list(GET foreign 0 first)
  message(FATAL_ERROR "${foreign_count} instructions of AVX-512 in ${OBJECT}, the first: ${first}")
endif()
message(STATUS "${found}, no instruction of AVX-512")
