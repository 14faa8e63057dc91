// Rounds that fail, and what comes after them.
#pragma once

namespace sanitize {

// A rank that does not come, and comes later; the others restart with it or without it.
void play_absences();
// Ranks that call a round with different arguments, and restart.
void play_disagreements();

}  // namespace sanitize
