"""What a process stands on: errors, atomic files, command line, device and dtype, the door to the kernels, console."""
