// What the planner chooses from: every way to shape the ranks as ulysses x rows x ring, with every strategy that takes the mesh
// and every layout; each with its bytes in closed form and, once it is settled, with what its layout makes of the work.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/error.h"
#include "parallel/cost_model.h"
#include "parallel/planner.h"

namespace dattn {

// A candidate on the way: bytes first; its layout's work, memory and a simulation when it comes to that.
struct Draft {
  Candidate candidate;
  TransferLists transfers;
  SeenRows seen;
  double heads = 1;  // balance of the heads alone
  int order = 0;     // lower first where costs are equal
  int place = 0;     // of its layout: fewer pieces first
  bool settled = false;
};

bool fetches(std::string_view strategy);  // or halo: what they move depends on the layout

class Candidates {
 protected:
  explicit Candidates(const PlanRequest& request);

  bool by_time() const { return request_.objective == Objective::kTime; }
  int ranks() const { return request_.ranks.value_or(request_.mesh.ranks()); }

  void add_all();                                    // to drafts_
  std::vector<Layout> layouts(int parts) const;      // to be tried, those of fewest pieces first
  void place(const MeshShape& mesh, Layout layout);  // puts the one problem that all share on a mesh, with a layout
  Draft draft_of(const MeshShape& mesh, const Strategy& strategy, Layout layout);
  void settle(Draft& draft);  // its balance, and on a machine its time

  // Does what may find out that a candidate cannot be planned; then that is a reason to reject it.
  template <class Body>
  bool attempt(const std::string& what, const Body& body) {
    try {
      body();
      return true;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kBadInput) throw;
      rejected_.push_back({what, error.what()});
      return false;
    }
  }

  const PlanRequest& request_;
  std::shared_ptr<Problem> problem_;
  double pairs_ = 0;
  std::vector<Draft> drafts_;
  std::vector<Rejected> rejected_;

 private:
  struct Unsuited {
    int meshes = 0;
    std::string first_reason;
  };

  int outside() const { return request_.mesh.size(Axis::kData) * request_.mesh.size(Axis::kTensor); }
  std::vector<MeshShape> meshes() const;
  std::vector<MeshShape> with_heads(std::vector<MeshShape> all);
  int inner_ring(const MeshShape& mesh) const;
  void add_mesh(const MeshShape& mesh);
  void set_time(Draft& draft, const LayoutWork& work) const;
  void refuse(const std::string& what, const std::string& why);  // on the mesh that is being added
  void add_fetches(const MeshShape& mesh, const Strategy& strategy);
  void tell_untried();

  std::string wanted_;  // strategy: auto, or the only one to consider
  int meshes_ = 0;
  std::map<std::string, Unsuited> unsuited_;  // strategies on meshes that they have no use for
  std::map<Layout, SeenRows> seen_;           // of the mesh that is being added
  std::optional<LayoutCosts> costs_;
};

}  // namespace dattn
