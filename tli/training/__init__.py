"""Loss, optimiser step, loop, resume, memory budget."""
