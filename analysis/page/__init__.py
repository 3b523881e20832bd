"""Reports that people look at: tables, charts and one interactive page."""
