"""What everything else stands on: files, devices, processes, seeds, memory errors, numbers as text."""
