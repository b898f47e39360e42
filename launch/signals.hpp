#pragma once

namespace arcus {

/// From now on USR1, TERM and INT ask for "save a checkpoint at the end of the step, then exit 75"
/// instead of ending the process. A second INT ends it at once, as does TERM once
/// `ignore_stop_requests` was called.
void install_signal_handlers();
/// After a communication failure a checkpoint cannot be completed: signals get their default
/// meaning back and stop_requested() is false for good.
void ignore_stop_requests();
/// True once such a signal has arrived; cheap, meant to be polled once a step.
bool stop_requested();
/// "USR1", "TERM" or "INT": the signal that arrived first; empty before.
const char* stop_signal_name();

}  // namespace arcus
