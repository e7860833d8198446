// What a process says when a library that runs a method crashes.
//
// Qualcomm's emulator runs inside the process, and a crash of its own cannot be undone. It can be
// said in one sentence, and the process can end with an exit code that its caller expects.
#pragma once

namespace doubleweave {

/// From now on a signal that ends the process (segmentation fault, bus error, illegal instruction,
/// arithmetic error, abort) first writes one sentence to what is standard error now: which method
/// ran in the thread that crashed, and what to do. The process then ends with `exit_code`, without
/// its exit handlers. May be called again, with another code.
void say_crashes(int exit_code);

}  // namespace doubleweave
