"""Never runs: the nodes of this app's tests are not SuperNodes."""

from flwr.clientapp import ClientApp

app = ClientApp()
