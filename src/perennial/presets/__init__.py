"""Published experiments as typed values, one file each."""
