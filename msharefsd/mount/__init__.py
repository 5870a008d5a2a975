"""What the kernel's VFS sees."""
