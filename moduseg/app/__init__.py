"""The demo: its state without a page, the page, and the server."""
