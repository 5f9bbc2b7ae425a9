"""The Keras layer as a backend of the conformance kit, on the framework that Keras runs on."""
