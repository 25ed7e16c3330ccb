"""What a run needs of a pod and how fast it could be there, before it is paid for."""
