"""What is imitated: episodes of scripted experts, recorded once and read as batches."""
