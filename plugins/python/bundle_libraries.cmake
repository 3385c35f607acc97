# Run at install: copies what libdattn.so needs, but for glibc and the compiler's runtime, beside it.
set(folder "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/dattn")

# Wheels cannot hold links: of a chain of versions one file stays, under the name it is looked for by.
file(GLOB versions "${folder}/libdattn.so.*")
foreach(file IN LISTS versions)
  if(IS_SYMLINK "${file}")
    file(REMOVE "${file}")
  else()
    file(RENAME "${file}" "${folder}/libdattn.so")
  endif()
endforeach()

file(GET_RUNTIME_DEPENDENCIES LIBRARIES "${folder}/libdattn.so" RESOLVED_DEPENDENCIES_VAR found
     POST_EXCLUDE_REGEXES "/ld-linux" "/lib(c|m|dl|rt|pthread|stdc\\+\\+|gcc_s)\\.so")
foreach(library IN LISTS found)  # its name here is its soname; behind it may stand a link
  get_filename_component(name "${library}" NAME)
  file(REAL_PATH "${library}" file)
  file(COPY_FILE "${file}" "${folder}/${name}")
endforeach()
if(strip)
  execute_process(COMMAND "${strip}" --strip-unneeded "${folder}/libdattn.so")
endif()
