"""What Python lacks of Linux: system calls, ioctls, files of /proc.  Nothing of ours."""
