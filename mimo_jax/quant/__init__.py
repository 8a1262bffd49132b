"""Number formats of stored weights: MXFP4 and what training needs of it."""
