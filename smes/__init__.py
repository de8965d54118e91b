"""The science and the shared vocabulary: pure, no broker, store, HTTP, files or clock."""
