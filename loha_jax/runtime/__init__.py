"""JAX versions, array types on meshes, processes, and untrusted input."""
