#include "launch/train_run.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <random>

#include "launch/fingerprint.hpp"
#include "launch/plan.hpp"
#include "launch/run_setup.hpp"
#include "launch/signals.hpp"
#include "launch/threads.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/train/evaluation.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

std::string new_run_id() {
  std::random_device device;
  return hex((static_cast<std::uint64_t>(device()) << 32) | device());
}

/// `lines` one by one, so that each stands on a line of its own in run.log.
void log_lines(const std::string& lines) {
  for (std::size_t begin = 0; begin < lines.size();) {
    const std::size_t end = std::min(lines.find('\n', begin), lines.size());
    spdlog::info("{}", lines.substr(begin, end - begin));
    begin = end + 1;
  }
}

/// The first free name NAME-1, NAME-2, ... beside `path`.
fs::path free_name(const fs::path& path) {
  for (int i = 1;; ++i) {
    fs::path candidate = path;
    candidate += fmt::format("-{}", i);
    if (!fs::exists(candidate)) return candidate;
  }
}

double largest_load(const StepMetrics& metrics) {
  double load = 0;
  for (const LayerMetrics& layer : metrics.layers) load = std::max(load, layer.max_mean_load);
  return load;
}

}  // namespace

TrainRun::TrainRun(Session& session, const Config& config, const std::string& resume)
    : session_(session),
      config_(config),
      dir_(config.run.dir),
      dataset_(open_dataset(session, config.run.data)),
      trace_(config.run.dir, session.rank()) {
  session_.together([&] {
    config_.model.vocab_size = resolve_model(config_, &dataset_).vocab_size;
    resolve_ep_size(config_.parallel.ep_size, session_.comm().size(), config_.model.num_experts);
    sampler_ = std::make_unique<BatchSampler>(dataset_, config_.data, config_.train.seq_len,
                                              config_.run.seed);
  });
  open_folder(resume);
  stream_ = std::make_unique<Stream>(
      threads_per_rank(config_.parallel, session_.comm(), session_.stream()));
  print_plan();
  build();
  restore(resume);
  session_.together([&] {
    if (!session_.is_root()) return;
    metrics_ = std::make_unique<MetricsFile>(dir_ / "metrics.jsonl", trainer_->steps_done());
    std::ofstream(dir_ / "config.toml") << to_toml(config_);
  });
}

void TrainRun::open_folder(const std::string& resume) {
  session_.together([&] {
    if (!session_.is_root()) return;
    lock_ = std::make_unique<RunLock>(dir_);
    if (resume == "none") start_afresh();
    attach_run_log(dir_ / "run.log");
    spdlog::info("arcus {}, run folder {}", version_line(), dir_.string());
  });
}

/// What an earlier run left is moved aside: nothing is lost, nothing is mixed up.
void TrainRun::start_afresh() {
  for (const char* name : {"checkpoints", "metrics.jsonl", "run.log", "routing"}) {
    const fs::path old = dir_ / name;
    if (!fs::exists(old)) continue;
    const fs::path aside = free_name(old);
    fs::rename(old, aside);
    spdlog::info("moved {} of an earlier run to {}", old.string(), aside.string());
  }
}

void TrainRun::print_plan() {
  session_.together([&] {
    if (!session_.is_root()) return;
    const std::string changed = changed_from_defaults(config_);
    if (!changed.empty()) log_lines("configuration, other than the defaults:\n" + changed);
    log_lines(describe_plan(config_, resolve_model(config_, &dataset_), &dataset_,
                            session_.comm().size(), stream_->num_threads()));
  });
}

void TrainRun::build() {
  const TrainerOptions options = trainer_options(config_, resolve_model(config_, &dataset_));
  session_.together([&] { fingerprint_ = numeric_fingerprint(options, *stream_); });
  check_fingerprints(session_.comm(), *stream_, fingerprint_, config_.run.reproducible);
  const int ep_size =
      resolve_ep_size(config_.parallel.ep_size, session_.comm().size(), config_.model.num_experts);
  instance_ = std::make_unique<ModelInstance>(make_process_groups(session_.comm(), ep_size),
                                              *stream_, instance_options(options));
  trainer_ = std::make_unique<Trainer>(*instance_, options);
  session_.together([&] {
    const PrimitiveReport report = instance_->build_primitives();
    if (session_.is_root()) {
      spdlog::info("{} matrix-product primitives built in {:.1f} s, {:.1f} MB of scratch",
                   report.primitives, report.seconds, static_cast<double>(report.bytes) / 1e6);
    }
  });
  watchdog_ = make_watchdog(session_.comm(), config_.run.stuck_after_s);
  trainer_->set_heartbeat([this](std::int64_t step, std::int64_t layer, const char* what) {
    watchdog_->beat(step, layer, what);
  });
}

void TrainRun::restore(const std::string& resume) {
  const auto resumed = resume_checkpoint(session_.comm(), *stream_, dir_,
                                         resume == "none" ? "none" : resume, trainer_->state());
  if (!resumed) {
    trainer_->initialize();
    run_id_ = broadcast_text(session_.comm(), *stream_, new_run_id());
    return;
  }
  session_.together([&] { check_resumed(resumed->info); });
  trainer_->finish_reading();
  run_id_ = resumed->info.run_id;
  saved_step_ = trainer_->steps_done();
  if (session_.is_root()) {
    spdlog::info("going on from {} (step {} of {})", resumed->path.string(), trainer_->steps_done(),
                 config_.train.steps);
  }
}

void TrainRun::check_resumed(const CheckpointInfo& info) {
  const auto extra = [&](const char* key) {
    const auto it = info.extra.find(key);
    return it == info.extra.end() ? std::string() : it->second;
  };
  const Tokenizer& tokenizer = dataset_.tokenizer();
  ARCUS_REQUIRE(extra(extra_key::kTokenizerKind) == tokenizer.kind() &&
                    extra(extra_key::kTokenizer) == tokenizer.serialized(),
                ExitCode::data,
                "the checkpoint was trained on data with another tokenizer ({}) than {} has ({}); "
                "prepare the data with the first run's tokenizer or start a new run",
                extra(extra_key::kTokenizerKind), config_.run.data, tokenizer.kind());
  if (!session_.is_root()) return;
  if (extra(extra_key::kDataFingerprint) != hex(dataset_.fingerprint())) {
    spdlog::warn("{} is not the data that the checkpoint was trained on; samples will differ",
                 config_.run.data);
  }
  if (info.fingerprint != fingerprint_) {
    spdlog::warn(
        "the checkpoint was made with other arithmetic ({}) than here ({}): from now on "
        "bits will differ",
        info.fingerprint, fingerprint_);
  }
  const std::string changes =
      differences(from_toml(info.config_text, "the checkpoint's configuration"), config_);
  if (!changes.empty()) log_lines("changed since the checkpoint:\n" + changes);
}

bool TrainRun::is_due(std::int64_t every) const {
  return every > 0 && trainer_->steps_done() % every == 0;
}

bool TrainRun::time_is_up() const {
  const std::chrono::duration<double, std::ratio<60>> minutes = Clock::now() - start_;
  return config_.run.max_minutes > 0 && minutes.count() >= config_.run.max_minutes;
}

bool TrainRun::is_traced(std::int64_t step) const {
  return config_.run.trace_routing_every > 0 && step % config_.run.trace_routing_every == 0;
}

StepMetrics TrainRun::train_step(StepRequests& requests) {
  const std::int64_t step = trainer_->steps_done() + 1;
  if (!is_traced(step)) return trainer_->step(*sampler_, requests);
  session_.together([&] { trace_.begin_step(step); });
  trainer_->set_observer([this](std::int64_t layer, const MicroBatch& batch,
                                const Routing& routing) { trace_.record(layer, batch, routing); });
  StepMetrics metrics = trainer_->step(*sampler_, requests);
  trainer_->set_observer({});
  session_.together([&] { trace_.end_step(); });
  return metrics;
}

void TrainRun::report(const StepMetrics& metrics) {
  if (!session_.is_root()) return;
  metrics_->write(to_json_line(metrics));
  progress_->update(
      {metrics.step, metrics.loss, metrics.timing.tokens_per_s, largest_load(metrics)});
}

void TrainRun::evaluate_now() {
  if (evaluated_step_ == trainer_->steps_done()) return;
  watchdog_->beat(trainer_->steps_done(), 0, "evaluation");
  const EvalMetrics eval = evaluate(*instance_, dataset_, config_.data, {}, config_.eval.batches,
                                    trainer_->steps_done());
  evaluated_step_ = trainer_->steps_done();
  if (!session_.is_root()) return;
  metrics_->write(to_json_line(eval));
  progress_->clear();
  std::string text = fmt::format("held out, step {}:", eval.step);
  for (const DomainEval& d : eval.domains) {
    text += fmt::format("  {} {:.3f} bits/byte", d.domain, d.bits_per_byte);
  }
  spdlog::info("{}", text);
}

void TrainRun::save() {
  if (saved_step_ == trainer_->steps_done()) return;
  const Tokenizer& tokenizer = dataset_.tokenizer();
  CheckpointInfo info{.step = trainer_->steps_done(),
                      .config_text = to_toml(config_),
                      .fingerprint = fingerprint_,
                      .run_id = run_id_,
                      .created_by = "arcus " + version_line()};
  info.extra = {{extra_key::kTokenizerKind, tokenizer.kind()},
                {extra_key::kTokenizer, tokenizer.serialized()},
                {extra_key::kDataFingerprint, hex(dataset_.fingerprint())},
                {extra_key::kEpSize, fmt::format("{}", instance_->groups().ep->size())}};
  const SaveOptions options{.keep = config_.checkpoint.keep,
                            .keep_every = config_.checkpoint.keep_every,
                            .on_stage = [this](std::string_view) {
                              watchdog_->beat(trainer_->steps_done(), 0, "checkpoint");
                            }};
  const SaveReport report =
      save_checkpoint(session_.comm(), *stream_, dir_, info, trainer_->state(), options);
  saved_step_ = trainer_->steps_done();
  if (!session_.is_root()) return;
  progress_->clear();
  spdlog::info("saved {} ({:.1f} MB)", report.path.string(),
               static_cast<double>(report.bytes) / 1e6);
}

void TrainRun::stop_if_diverging() {
  const std::int64_t bad = trainer_->bad_steps_in_a_row();
  if (bad < config_.run.max_bad_steps) return;
  save();
  session_.together([&] {
    ARCUS_FAIL(ExitCode::usage,
               "{} non-finite steps in a row (run.max_bad_steps); everything is saved in {}; lower "
               "train.lr ({}) or train.grad_clip ({}), or go on from an earlier checkpoint",
               bad, dir_.string(), config_.train.lr, config_.train.grad_clip);
  });
}

ExitCode TrainRun::run() {
  start_ = Clock::now();
  if (session_.is_root()) {
    progress_ = std::make_unique<ProgressLine>(stderr, trainer_->steps_done(), config_.train.steps,
                                               config_.run.max_minutes);
  }
  StepRequests requests;
  while (trainer_->steps_done() < config_.train.steps && !requests.stop && !requests.time_up) {
    requests = {.stop = stop_requested(), .time_up = session_.is_root() && time_is_up()};
    const StepMetrics metrics = train_step(requests);
    report(metrics);
    stop_if_diverging();
    if (is_due(config_.eval.every)) evaluate_now();
    if (is_due(config_.checkpoint.every)) save();
  }
  if (requests.stop && trainer_->steps_done() < config_.train.steps) {
    save();
    if (session_.is_root()) {
      spdlog::info("stopped by a signal at step {}; the same command goes on from there",
                   trainer_->steps_done());
    }
    return ExitCode::interrupted;
  }
  save();
  evaluate_now();
  if (session_.is_root()) {
    progress_->clear();
    spdlog::info("{} at step {} of {}", requests.time_up ? "time is up" : "done",
                 trainer_->steps_done(), config_.train.steps);
  }
  return ExitCode::ok;
}

}  // namespace arcus
