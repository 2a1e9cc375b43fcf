"""EvoLink's image API: the published page without I/O, then the HTTP client."""
