// Whether our declaration of a C function and the real one are called alike.
#pragma once

#include <type_traits>

namespace standin {

// Passed alike: pointers by pointers, integers and enumerations by those of equal size, structures of equal size.
template <class A, class B>
constexpr bool alike = std::is_pointer_v<A> == std::is_pointer_v<B>&& std::is_class_v<A> == std::is_class_v<B> &&
                       sizeof(A) == sizeof(B) && alignof(A) == alignof(B);

template <class Ours, class Real>
struct Same : std::false_type {};
template <class R, class... A, class S, class... B>
requires(sizeof...(A) == sizeof...(B)) struct Same<R (*)(A...), S(B...)>
    : std::bool_constant<alike<R, S> && (alike<A, B> && ...)> {
};

template <class Ours, class Real>
constexpr bool same = Same<Ours, Real>::value;

}  // namespace standin
