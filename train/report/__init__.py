"""What people see: words, pages, pictures, the log."""
