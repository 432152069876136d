"""How rows move between ranks: one module a transport, all with the interface of `base.Transport`."""
