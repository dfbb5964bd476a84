"""Files of rows -> token caches -> the batches of each optimizer step."""
