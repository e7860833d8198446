// The last sentence of a process in which a library crashes while it runs a method.
//
// Qualcomm's emulator runs inside the process, so that its crash ends the process. A child process
// for the emulator would copy every value that passes between the devices. The handler names the
// method and ends with an exit code that callers expect.
#pragma once

namespace doubleweave {

/// From now on a signal that ends the process (segmentation fault, bus error, illegal instruction,
/// arithmetic error, abort) first writes one sentence to what is standard error now: which method
/// ran in the thread that crashed, and what to do. The process then ends with `exit_code`, without
/// its exit handlers. May be called again, with another code.
void say_crashes(int exit_code);

}  // namespace doubleweave
