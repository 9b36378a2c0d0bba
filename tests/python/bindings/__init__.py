"""What the extension makes of arrays, arguments, threads and processes."""
