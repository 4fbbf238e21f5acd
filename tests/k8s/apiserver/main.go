// A Kubernetes API server with its etcd in one process, for tests: nothing schedules or runs a pod.
package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

// Usage: apiserver DATA ETCD_PORT PEER_PORT, then the arguments of kube-apiserver.
func main() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: apiserver DATA ETCD_PORT PEER_PORT [kube-apiserver arguments]")
		os.Exit(2)
	}
	data, client, peer := os.Args[1], loopback(os.Args[2]), loopback(os.Args[3])
	config := embed.NewConfig()
	config.Dir = filepath.Join(data, "etcd")
	config.LogLevel = "error"
	config.UnsafeNoFsync = true
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	etcd, err := embed.StartEtcd(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	<-etcd.Server.ReadyNotify()
	os.Args = append([]string{"kube-apiserver", "--etcd-servers=" + client.String()}, os.Args[4:]...)
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}

func loopback(port string) url.URL {
	return url.URL{Scheme: "http", Host: "127.0.0.1:" + port}
}
