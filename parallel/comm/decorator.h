// What decorators (decorators.h, slowed.h) are made from.
#pragma once

#include "parallel/comm/communicator.h"

namespace dattn {

// Forwards everything, and decorates the parts of a group like the group. The collectives stay those of Communicator, made of
// this object's own start() and wait(), so that what a decorator does to exchanges it does to every byte of a collective too. A
// decorator that only looks on is an Observer instead (decorators.cpp): it leaves a back end's own collectives as they are.
class Decorator : public Communicator {
 public:
  explicit Decorator(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string_view name() const override { return inner_->name(); }
  Ticket start(std::span<const SendPart> sends, std::span<const RecvPart> receives, const OpLabel& label) override {
    return inner_->start(sends, receives, label);
  }
  void wait(Ticket ticket) override { inner_->wait(ticket); }
  std::unique_ptr<Communicator> split(std::span<const int> ranks, std::string_view part) override {
    return decorate(inner_->split(ranks, part));
  }
  std::unique_ptr<Communicator> partition(std::span<const int> ranks, std::string_view part) override {
    return decorate(inner_->partition(ranks, part));
  }
  Trace* trace() const override { return inner_->trace(); }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }
  void abort(const std::string& reason, ErrorCode code) noexcept override { inner_->abort(reason, code); }
  JobEnd job_end() const override { return inner_->job_end(); }
  void terminate_job(int exit_code) noexcept override { inner_->terminate_job(exit_code); }

 protected:
  virtual std::unique_ptr<Communicator> decorate(std::unique_ptr<Communicator> part) const = 0;

  std::unique_ptr<Communicator> inner_;
};

}  // namespace dattn
