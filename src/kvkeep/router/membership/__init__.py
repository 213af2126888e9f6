"""Which engines belong to the fleet: by command line, file, API and etcd."""
