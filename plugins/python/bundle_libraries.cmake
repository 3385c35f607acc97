# Run at install: copies what libdattn.so needs, but for glibc and the compiler's runtime, beside it, and the licences of what it
# copies, as their packages give them, into licenses/.
set(folder "$ENV{DESTDIR}${CMAKE_INSTALL_PREFIX}/dattn")

# Wheels cannot hold links: of a chain of versions one file stays, under its soname, by which libdattn_jax.so needs it.
file(GLOB versions "${folder}/libdattn.so.*")
foreach(file IN LISTS versions)
  if(IS_SYMLINK "${file}")
    file(REAL_PATH "${file}" behind)
    file(RENAME "${behind}" "${file}")
  endif()
endforeach()

file(GLOB library "${folder}/libdattn.so.*")
file(GET_RUNTIME_DEPENDENCIES LIBRARIES "${library}" RESOLVED_DEPENDENCIES_VAR found
     POST_EXCLUDE_REGEXES "/ld-linux" "/lib(c|m|dl|rt|pthread|stdc\\+\\+|gcc_s)\\.so")
foreach(needed IN LISTS found)  # its name here is its soname; behind it may stand a link
  get_filename_component(name "${needed}" NAME)
  file(REAL_PATH "${needed}" file)
  file(COPY_FILE "${file}" "${folder}/${name}")
  execute_process(COMMAND dpkg-query --search "${file}" OUTPUT_VARIABLE owner ERROR_QUIET)
  string(REGEX MATCH "^[^:, ]+" package "${owner}")
  if(EXISTS "/usr/share/doc/${package}/copyright")
    file(MAKE_DIRECTORY "${folder}/licenses")
    file(COPY_FILE "/usr/share/doc/${package}/copyright" "${folder}/licenses/${name}.txt")
  else()
    message(WARNING "${file} is bundled without its licence: no Debian package owns it")
  endif()
endforeach()
if(strip)
  file(GLOB ours "${folder}/libdattn*")
  execute_process(COMMAND "${strip}" --strip-unneeded ${ours})
endif()
