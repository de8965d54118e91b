"""The join of impressions with the feedback that comes later."""
