import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.CountDownLatch;
import org.neo4j.cli.AdminTool;
import org.neo4j.cli.ExecutionContext;
import org.neo4j.dbms.api.DatabaseManagementService;
import org.neo4j.dbms.api.DatabaseManagementServiceBuilder;

/**
 * A Neo4j Community server from its jars: {@code FleetNeo4j HOME CONF_DIR PASSWORD_FILE}.
 *
 * <p>The first start sets the password of the user neo4j before anything listens, so that the
 * well-known default is never accepted. SIGTERM shuts the databases down cleanly.
 */
public final class FleetNeo4j {
    public static void main(String[] args) throws Exception {
        Path home = Path.of(args[0]);
        Path conf = Path.of(args[1]);
        Path passwordFile = Path.of(args[2]);

        if (!Files.exists(home.resolve("data/databases/system"))) {
            String password = Files.readString(passwordFile, StandardCharsets.UTF_8).strip();
            int exit = AdminTool.execute(
                    new ExecutionContext(home, conf), "dbms", "set-initial-password", password);
            if (exit != 0) {
                System.err.println("neo4j: the initial password could not be set, exit " + exit);
                System.exit(exit);
            }
        }

        DatabaseManagementService service = new DatabaseManagementServiceBuilder(home)
                .loadPropertiesFromFile(conf.resolve("neo4j.conf"))
                .build();
        CountDownLatch stopped = new CountDownLatch(1);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            service.shutdown();
            stopped.countDown();
        }));
        stopped.await();
    }
}
