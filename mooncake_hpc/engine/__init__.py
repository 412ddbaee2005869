"""The transfer engine: batches, their submission, slicing, remote segments, registrations."""
