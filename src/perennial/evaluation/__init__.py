"""What was learned, what was forgotten, and how sure that is."""
