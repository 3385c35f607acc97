// The least that a rank of any distribution of full attention must receive, forward: what plans are measured against.
//
// G = B K groups of one KV head and the g = H / K query heads that share it, n = S / P rows of a rank. A rank holds g n query
// rows and n key rows of every group, which cover g n^2 score cells for free; x more query rows and y more key rows of a
// group let it cover (g n + x)(n + y), and each row received costs 2 D elements: a query row and its result, a key row and
// its value. All ranks together must cover the G g S^2 cells, so one of them covers at least G g S^2 / P. Cells per row
// grow with the rows of one group, so the cheapest way fills groups one after the other:
//
//   P <= g:  2 D G (S - n)                                                       all keys, no query
//   P > g:   2 D X for the smallest X with q g S^2 + f(X - q cap) + (G - q - 1) g n^2 >= G g S^2 / P,
//            cap = (g + 1)(S - n), q = floor(X / cap), f(X) = max (g n + x)(n + y) over x + y <= X
//
// Masks that hide cells may need less; the strategies fetch and halo make use of that. Source of the method: Irony, Toledo,
// Tiskin, "Communication lower bounds for distributed-memory matrix multiplication", 2004.
#pragma once

#include "parallel/attention.h"

namespace dattn {

// Elements a rank, for `parts` ranks along the sequence and `tensor` ranks that share out the heads.
double lower_bound_elements(const AttentionShape& shape, int parts, int tensor = 1);
double lower_bound_bytes(const AttentionShape& shape, const MeshShape& mesh);  // at the size of the storage type

}  // namespace dattn
