"""The feature bank: purification, aggregation, outlier filter, storage."""
