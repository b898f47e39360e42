#include "launch/train_run.hpp"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>

#include "checkpoints/saver.hpp"
#include "kernels/gradient.hpp"
#include "launch/portable.hpp"
#include "launch/run_folder.hpp"
#include "launch/run_setup.hpp"
#include "launch/signals.hpp"
#include "launch/threads.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/hdf5.hpp"
#include "src/base/log.hpp"
#include "src/train/fingerprint.hpp"
#include "src/train/plan.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

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

/// The signal may have reached another rank.
std::string stop_reason() {
  const std::string name = stop_signal_name();
  return name.empty() ? "stopped by a signal" : "stopped by " + name;
}

double largest_load(const StepMetrics& metrics) {
  double load = 0;
  for (const LayerMetrics& layer : metrics.layers) load = std::max(load, layer.max_mean_load);
  return load;
}

}  // namespace

/// The run's checkpoints, and how long training waits for them.
class TrainRun::Saver final : public RunSaver {
 public:
  Saver(TrainRun& run, bool background)
      : run_(run), saver_(run.session_.comm(), *run.stream_, run.dir_), background_(background) {
    run_.trainer_->set_before_update([this] { waited([this] { saver_.wait_copied(); }); });
  }

  void save() override {
    begin(/*copy=*/false);
    finish();
  }
  bool start() override {
    begin(background_);
    if (!background_) finish();
    return background_;
  }
  bool busy() override { return saver_.busy(); }
  bool advance() override {
    std::optional<SaveReport> report;
    waited([&] { report = saver_.advance(); });
    if (report) announce(*report);
    return report.has_value();
  }
  void finish() override {
    SaveReport report;
    waited([&] {
      report = saver_.finish(
          [this] { run_.watchdog_->beat(run_.trainer_->steps_done(), 0, "checkpoint"); });
    });
    announce(report);
  }
  bool restore(const std::function<bool(std::int64_t)>& may_be_used) override {
    Communicator& world = run_.session_.comm();
    const std::vector<StateView> state = run_.trainer_->state();
    const std::int64_t step = run_.trainer_->steps_done();
    const auto beat = [&] { run_.watchdog_->beat(step, 0, "reading a checkpoint"); };
    for (const std::int64_t candidate : saved_steps()) {
      const fs::path path = checkpoint_path(run_.dir_, candidate);
      // First without touching the state, with which training could still go on.
      if (!may_be_used(candidate) || !is_usable(world, *run_.stream_, path, state, beat)) continue;
      resume_checkpoint(world, *run_.stream_, run_.dir_, path.string(), state, beat);
      run_.trainer_->finish_reading();
      run_.open_digests();
      return true;
    }
    return false;
  }
  void keep(std::int64_t step) override { kept_ = step; }

 private:
  using Clock = std::chrono::steady_clock;

  void begin(bool copy) {
    begin_ = Clock::now();
    waited_ = {};
    waited([&] {
      SaveOptions options = run_.save_options();
      options.also = kept_;
      saver_.start(run_.checkpoint_info(), run_.trainer_->state(), options, copy);
    });
  }
  /// Newest first; what rank 0 sees.
  std::vector<std::int64_t> saved_steps() {
    std::string text;
    run_.session_.together([&] {
      if (!run_.session_.is_root()) return;
      for (const fs::path& path : list_checkpoints(run_.dir_)) {
        text += fmt::format("{} ", *step_of_checkpoint(path));
      }
    });
    std::istringstream numbers(broadcast_text(run_.session_.comm(), *run_.stream_, text));
    return {std::istream_iterator<std::int64_t>(numbers), {}};
  }
  template <class Fn>
  void waited(Fn&& fn) {
    const Clock::time_point begin = Clock::now();
    fn();
    waited_ += Clock::now() - begin;
  }
  void announce(const SaveReport& report) {
    run_.watchdog_->beat(run_.trainer_->steps_done(), 0, "checkpoint");
    if (!run_.progress_) return;
    run_.progress_->clear();
    const std::chrono::duration<double> seconds = Clock::now() - begin_;
    const std::chrono::duration<double> waited = waited_;
    spdlog::info("saved {} ({:.1f} MB in {:.2f} s, training waited {:.3f} s)", report.path.string(),
                 static_cast<double>(report.bytes) / 1e6, seconds.count(), waited.count());
  }

  TrainRun& run_;
  CheckpointSaver saver_;
  bool background_;
  std::int64_t kept_ = -1;
  Clock::time_point begin_;
  Clock::duration waited_{};
};

TrainRun::~TrainRun() = default;

TrainRun::TrainRun(Session& session, const Config& config, const RunStart& start)
    : session_(session),
      config_(config),
      start_(start),
      dir_(config.run.dir),
      dataset_(open_dataset(session, config.run.data)) {
  session_.together([&] { check_start(); });
  session_.together([&] {
    config_.model.vocab_size = resolve_model(config_, &dataset_).vocab_size;
    resolve_ep_size(config_.parallel.ep_size, session_.comm().size(), config_.model.num_experts);
    sampler_ = std::make_unique<BatchSampler>(dataset_, config_.data, config_.train.seq_len,
                                              config_.run.seed);
  });
  stream_ = std::make_unique<Stream>(
      set_up_threads(config_.parallel, session_.comm(), session_.stream()));
  const TrainerOptions options = trainer_options(config_, resolve_model(config_, &dataset_));
  // Before anything in the folder is touched.
  const CheckedPlan checked = checked_plan(session_, config_, options, stream_->num_threads());
  open_folder();
  print_plan(checked);
  build();
  restore();
  watch();
  saver_ = std::make_unique<Saver>(*this, checked.background_saves);
  session_.together([&] {
    if (session_.is_root()) write_config();
  });
}

namespace {

/// What was imported or merged is no run's; one that cannot be opened is left to the reader.
void require_more_than_weights(const fs::path& path) {
  Checkpoint checkpoint;
  try {
    checkpoint = open_checkpoint(path);
  } catch (const Error&) {
    return;
  }
  ARCUS_REQUIRE(!holds_weights_alone(checkpoint), ExitCode::usage,
                "{0} holds weights alone, nothing that a run could go on from; start one from them "
                "in another folder: --init {0} --set run.dir=FOLDER",
                path.string());
}

}  // namespace

/// Before anything in the folder is touched.
void TrainRun::check_start() {
  const std::string& resume = start_.resume;
  ARCUS_REQUIRE(resume == "auto" || resume == "none" || fs::exists(resume), ExitCode::usage,
                "--resume {}: no such checkpoint or run folder; it takes auto, none or a path",
                resume);
  const auto own = resume == "auto"   ? find_latest(dir_)
                   : resume == "none" ? std::nullopt
                                      : std::optional(locate_checkpoint(resume));
  if (session_.is_root() && own) require_more_than_weights(*own);
  if (start_.init.path.empty()) return;
  ARCUS_REQUIRE(resume == "auto" || resume == "none", ExitCode::usage,
                "--resume {} goes on with a run, --init {} starts one; give one of them", resume,
                start_.init.path);
  if (!session_.is_root()) return;
  // A run that goes on from its own checkpoints needs it no more; it may be gone.
  if (own) return;
  const fs::path source = fs::weakly_canonical(locate_checkpoint(start_.init.path));
  ARCUS_REQUIRE(source.parent_path() != fs::weakly_canonical(dir_ / "checkpoints"), ExitCode::usage,
                "--init {} is a checkpoint of {} itself; set run.dir to another folder",
                start_.init.path, dir_.string());
  const CheckpointInfo info = open_checkpoint(source).info;
  if (info.extra.contains(extra_key::kTokenizer)) {
    check_tokenizer(info);
  } else {
    spdlog::warn("{} says nothing of its tokenizer; whether it is that of {} is for you to know",
                 source.string(), config_.run.data);
  }
}

/// For people: a run reads the copy in its checkpoints, so a full disk is no reason to stop. The
/// old file stands until the new one is whole.
void TrainRun::write_config() const {
  const fs::path file = dir_ / "config.toml";
  const fs::path fresh = dir_ / "config.toml.tmp";
  std::error_code error;
  std::ofstream out(fresh);
  out << to_toml(config_) << std::flush;
  const bool written = out.good();
  out.close();
  if (written) fs::rename(fresh, file, error);
  if (!written || error) {
    spdlog::warn("cannot write {}{}", file.string(), error ? ": " + error.message() : "");
    fs::remove(fresh, error);
  }
}

void TrainRun::open_folder() {
  session_.together([&] {
    if (!session_.is_root()) return;
    lock_ = std::make_unique<RunLock>(dir_);
    // Metrics without a checkpoint belong to a run that cannot go on.
    const bool orphaned = list_checkpoints(dir_).empty() && fs::exists(dir_ / "metrics.jsonl");
    if (start_.resume == "none" || orphaned) start_afresh();
    attach_run_log(dir_ / "run.log");
    spdlog::info("arcus {}, run folder {}", version_line(), dir_.string());
  });
}

/// What an earlier run left is moved aside: nothing is lost, nothing is mixed up.
void TrainRun::start_afresh() {
  for (const char* name :
       {"checkpoints", "metrics.jsonl", "digests.jsonl", "run.log", "config.toml", "trace"}) {
    const fs::path old = dir_ / name;
    if (!fs::exists(old)) continue;
    // Saves that were cut short are no loss; the next one clears them away.
    if (old.filename() == "checkpoints" && list_checkpoints(dir_).empty()) continue;
    const fs::path aside = free_name(old);
    fs::rename(old, aside);
    spdlog::info("moved {} of an earlier run to {}", old.string(), aside.string());
  }
}

void TrainRun::print_plan(const CheckedPlan& checked) const {
  if (!session_.is_root()) return;
  const std::string changed = changed_from_defaults(config_);
  if (!changed.empty()) log_lines("configuration, other than the defaults:\n" + changed);
  for (const std::string& line : keys_without_effect(config_)) spdlog::warn("{}", line);
  if (const std::string reason = why_not_exportable(config_, resolve_model(config_, &dataset_));
      !reason.empty()) {
    spdlog::warn("this model cannot be exported: {}", reason);
  }
  log_lines(to_text(checked.plan));
  if (!checked.tight.empty()) spdlog::warn("{}", checked.tight);
  if (config_.checkpoint.background && config_.checkpoint.every > 0 && !checked.background_saves) {
    spdlog::warn(
        "training waits for checkpoints to be written: {}; checkpoint.background = false says that "
        "this is meant",
        h5::is_thread_safe()
            ? "no memory for a copy of the state (" + bytes_text(checked.plan.state_bytes) + ")"
            : "this HDF5 library is not for several threads");
  }
}

void TrainRun::build() {
  const TrainerOptions options = trainer_options(config_, resolve_model(config_, &dataset_));
  fingerprint_ = check_fingerprints(session_.comm(), *stream_, options.model,
                                    dtype_from_name(options.train.dtype), options.reproducible);
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
}

/// Once the state is there: reading a large checkpoint is no sign of being stuck.
void TrainRun::watch() {
  watchdog_ = make_watchdog(session_.comm(), config_.run.stuck_after_s);
  trainer_->set_heartbeat([this](std::int64_t step, std::int64_t layer, const char* what) {
    watchdog_->beat(step, layer, what);
  });
}

/// What can be said of the checkpoint before its tensors are read: a message about shapes would
/// hide the reason. One that cannot be opened is left to the reader, which may fall back.
void TrainRun::check_before_reading() {
  const std::string& resume = start_.resume;
  if (!session_.is_root() || resume == "none") return;
  const bool given = resume != "auto";
  const auto own = find_latest(dir_);
  const auto path = given ? std::optional(locate_checkpoint(resume)) : own;
  if (!path) return;
  const auto info_of = [](const fs::path& checkpoint) -> std::optional<CheckpointInfo> {
    try {
      return open_checkpoint(checkpoint).info;
    } catch (const Error&) {
      return std::nullopt;
    }
  };
  const auto info = info_of(*path);
  if (!info) return;
  check_tokenizer(*info);
  const auto present = given && own ? info_of(*own) : std::nullopt;
  ARCUS_REQUIRE(!present || present->run_id == info->run_id, ExitCode::usage,
                "{} holds checkpoints of another run than {}; set run.dir to another folder",
                dir_.string(), resume);
}

void TrainRun::restore() {
  session_.together([&] { check_before_reading(); });
  const auto resumed =
      resume_checkpoint(session_.comm(), *stream_, dir_, start_.resume, trainer_->state());
  if (!resumed) return begin();
  session_.together([&] { check_resumed(resumed->info); });
  trainer_->finish_reading();
  run_id_ = resumed->info.run_id;
  if (const auto found = resumed->info.extra.find(extra_key::kInitFrom);
      found != resumed->info.extra.end()) {
    init_from_ = found->second;
  }
  if (session_.is_root()) {
    if (!start_.init.path.empty()) {
      spdlog::info("--init {} is not used any more: the run has checkpoints of its own",
                   start_.init.path);
    }
    spdlog::info("going on from {} (step {} of {}); rank 0 read {:.1f} MB", resumed->path.string(),
                 trainer_->steps_done(), config_.train.steps,
                 static_cast<double>(resumed->bytes_read) / 1e6);
  }
}

void TrainRun::begin() {
  trainer_->initialize();
  if (!start_.init.path.empty()) read_first_weights();
  run_id_ = broadcast_text(session_.comm(), *stream_, new_run_id());
}

/// On top of the initial values; moments and counters stay as they are at a run's start.
void TrainRun::read_first_weights() {
  std::unique_ptr<InitSource> source;
  InitSource::Choice choice;
  session_.together([&] {
    source = std::make_unique<InitSource>(start_.init);
    choice = source->choose(trainer_->state());
  });
  load_checkpoint(session_.comm(), *stream_, source->checkpoint().path, choice.read, Match::subset);
  trainer_->finish_reading();
  init_from_ = source->origin();
  if (!session_.is_root()) return;
  spdlog::info("{} tensors from {}", choice.read.size(), init_from_);
  for (const auto& [names, what] :
       {std::pair{&choice.fresh, "kept at its initial values: {}"},
        std::pair{&choice.left_out, "of the checkpoint, left out: {}"}}) {
    for (const std::string& name : *names) spdlog::info(fmt::runtime(what), name);
  }
  if (!choice.added.empty()) spdlog::info("{} new tensors of adapters", choice.added.size());
  if (choice.bias_left_out) {
    spdlog::warn(
        "the checkpoint's expert biases are left out, since routing.expert_bias_rate and "
        "routing.quantile_rate are 0: tokens will choose other experts than they did there");
  }
}

namespace {

std::string extra_of(const CheckpointInfo& info, const char* key) {
  const auto it = info.extra.find(key);
  return it == info.extra.end() ? std::string() : it->second;
}

}  // namespace

void TrainRun::check_tokenizer(const CheckpointInfo& info) const {
  const Tokenizer& tokenizer = dataset_.tokenizer();
  ARCUS_REQUIRE(extra_of(info, extra_key::kTokenizerKind) == tokenizer.kind() &&
                    extra_of(info, extra_key::kTokenizer) == tokenizer.serialized(),
                ExitCode::data,
                "the checkpoint was trained on data with another tokenizer ({}) than {} has ({}); "
                "prepare the data with the first run's tokenizer or start a new run",
                extra_of(info, extra_key::kTokenizerKind), config_.run.data, tokenizer.kind());
}

void TrainRun::check_resumed(const CheckpointInfo& info) {
  check_tokenizer(info);
  if (!session_.is_root()) return;
  if (extra_of(info, extra_key::kDataFingerprint) != hex(dataset_.fingerprint())) {
    spdlog::warn("{} is not the data that the checkpoint was trained on; samples will differ",
                 config_.run.data);
  }
  if (info.fingerprint != fingerprint_) {
    spdlog::warn(
        "the checkpoint was made with other arithmetic ({}) than here ({}): from now on "
        "bits will differ",
        info.fingerprint, fingerprint_);
  }
  if (const std::string bits = extra_of(info, extra_key::kGradientScaleBits);
      bits != fmt::format("{}", kLeafScaleBits)) {
    spdlog::warn(
        "the checkpoint's run added gradients in units of 2^-{}, this one of 2^-{}: from now on "
        "bits will differ",
        bits, kLeafScaleBits);
  }
  const Config stored = from_toml(info.config_text, "the checkpoint's configuration");
  if (stored.train.global_batch_seqs != config_.train.global_batch_seqs ||
      stored.train.seq_len != config_.train.seq_len) {
    spdlog::warn(
        "train.global_batch_seqs or train.seq_len changed: a step's samples are counted from the "
        "step number, so some text will be skipped or seen again");
  }
  const std::string changes = differences(stored, config_);
  if (!changes.empty()) log_lines("changed since the checkpoint:\n" + changes);
}

RunOptions TrainRun::run_options() const {
  return {.eval = config_.eval,
          .checkpoint = config_.checkpoint,
          .max_minutes = config_.run.max_minutes,
          .max_bad_steps = config_.run.max_bad_steps,
          .spike_factor = config_.run.spike_factor,
          .trace_routing_every = config_.run.trace_routing_every,
          .verify_every = config_.run.verify_every,
          .run_dir = dir_};
}

RunHooks TrainRun::hooks() {
  return {.saver = saver_.get(),
          .stop_requested = [] { return stop_requested(); },
          .on_step = [this](const StepMetrics& metrics) { on_step(metrics); },
          .on_eval = [this](const EvalMetrics& metrics) { on_eval(metrics); }};
}

void TrainRun::on_step(const StepMetrics& metrics) {
  const std::int64_t every = config_.run.digest_every;
  if (every > 0 && metrics.step % every == 0) {
    const Checkpoint state = describe_state(session_.comm(), *stream_, trainer_->state());
    if (digests_) digests_->write(metrics.step, state);
    watchdog_->beat(metrics.step, 0, "digest");
  }
  if (!progress_) return;
  progress_->update(
      {metrics.step, metrics.loss, metrics.timing.tokens_per_s, largest_load(metrics)});
}

void TrainRun::on_eval(const EvalMetrics& metrics) {
  watchdog_->beat(trainer_->steps_done(), 0, "evaluation");
  if (!progress_) return;
  progress_->clear();
  std::string text = fmt::format("held out, step {}:", metrics.step);
  for (const DomainEval& d : metrics.domains) {
    text += fmt::format("  {} {:.3f} bits/byte", d.domain, d.bits_per_byte);
  }
  spdlog::info("{}", text);
}

CheckpointInfo TrainRun::checkpoint_info() const {
  const Tokenizer& tokenizer = dataset_.tokenizer();
  CheckpointInfo info{.step = trainer_->steps_done(),
                      .config_text = to_toml(config_),
                      .fingerprint = fingerprint_,
                      .run_id = run_id_,
                      .created_by = "arcus " + version_line()};
  info.extra = {{extra_key::kTokenizerKind, tokenizer.kind()},
                {extra_key::kTokenizer, tokenizer.serialized()},
                {extra_key::kDataFingerprint, hex(dataset_.fingerprint())},
                {extra_key::kGradientScaleBits, fmt::format("{}", kLeafScaleBits)},
                {extra_key::kEpSize, fmt::format("{}", instance_->groups().ep->size())}};
  if (const std::string& how = dataset_.manifest().pair_template; !how.empty()) {
    info.extra[extra_key::kPairTemplate] = how;
  }
  if (!init_from_.empty()) info.extra[extra_key::kInitFrom] = init_from_;
  return info;
}

SaveOptions TrainRun::save_options() const {
  // After non-finite steps the weights may be beyond repair: nothing older is given up for them.
  const bool doubtful = trainer_->bad_steps_in_a_row() > 0;
  return {.keep = doubtful ? 0 : config_.checkpoint.keep,
          .keep_every = config_.checkpoint.keep_every};
}

ExitCode TrainRun::finish(RunEnd end) {
  if (progress_) progress_->clear();
  const std::int64_t done = trainer_->steps_done();
  if (end == RunEnd::diverged) {
    session_.together([&] {
      ARCUS_FAIL(
          ExitCode::usage,
          "{} bad steps in a row (run.max_bad_steps) at step {}; everything is saved "
          "in {}, earlier checkpoints too; go on from one of them (--resume) with a lower "
          "train.lr ({}) or {}{}",
          trainer_->bad_steps_in_a_row(), done, dir_.string(), config_.train.lr,
          config_.train.grad_clip > 0 ? fmt::format("train.grad_clip ({})", config_.train.grad_clip)
                                      : "with train.grad_clip set (now off), e.g. to 1",
          config_.train.max_grad_norm > 0
              ? fmt::format(", or a higher train.max_grad_norm ({})", config_.train.max_grad_norm)
              : "");
    });
  }
  if (session_.is_root()) {
    const std::string what = end == RunEnd::finished  ? "done"
                             : end == RunEnd::time_up ? "time is up, saved"
                                                      : stop_reason() + ", saved";
    const bool nothing_to_do = end == RunEnd::finished && done == first_step_;
    spdlog::info("{} at step {} of {}{}", what, done, config_.train.steps,
                 nothing_to_do             ? "; nothing to do, train.steps sets how far to go"
                 : end == RunEnd::finished ? ""
                                           : "; the same command goes on from there");
  }
  return end == RunEnd::stopped ? ExitCode::interrupted : ExitCode::ok;
}

void TrainRun::open_digests() {
  session_.together([&] {
    if (session_.is_root() && config_.run.digest_every > 0) {
      digests_ = std::make_unique<DigestLog>(dir_, trainer_->steps_done());
    }
  });
}

ExitCode TrainRun::run() {
  first_step_ = trainer_->steps_done();
  open_digests();
  if (session_.is_root()) {
    progress_ = std::make_unique<ProgressLine>(stderr, trainer_->steps_done(), config_.train.steps,
                                               config_.run.max_minutes);
  }
  return finish(run_training(*trainer_, *sampler_, dataset_, config_.data, run_options(), hooks()));
}

}  // namespace arcus
