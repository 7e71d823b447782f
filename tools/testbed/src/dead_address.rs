//! An address where nobody answers.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};

/// A loopback address that refuses connections while this lives: its port is taken and nobody listens. A port that was merely free a
/// moment ago may be another process's by now.
#[derive(Debug)]
pub struct DeadAddress {
    _socket: OwnedFd,
    address: SocketAddr,
}

impl DeadAddress {
    /// Takes a port of the kernel's choice.
    pub fn new() -> Result<DeadAddress> {
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).context("no socket")?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?;
        let address = SocketAddr::try_from(getsockname(&socket)?)?;
        Ok(DeadAddress { _socket: socket, address })
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_refused_and_the_port_is_taken() {
        let dead = DeadAddress::new().expect("an address");
        let refused = std::net::TcpStream::connect(dead.host()).expect_err("nobody listens");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let taken = std::net::TcpListener::bind(dead.host()).expect_err("it is taken");
        assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    }
}
