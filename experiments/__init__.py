"""What uses the library without being part of it: benchmarks, templates for launching, results."""
