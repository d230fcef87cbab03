"""`millrace probe`: known questions through the real queue, so that a model that gets worse is noticed."""
